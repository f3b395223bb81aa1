"Damage to files: bytes, JSON, safetensors, pickles, faiss indices. Each change is drawn by a generator of random numbers."
import hashlib
import json
import os
import pickle
import re
import struct

ODD_NUMBERS = ['0', '-1', '1', '2', '1e400', '-1e400', 'NaN', 'Infinity', '-Infinity', '1e-320', '9'*25, '9'*5000, '0.1', '1.0', '1e9', '65537', '2147483648', '-0', 'true', 'false', 'null', '""', '"1"', '[]', '{}', '[[]]', '[1]', '{"a": 1}', '"'+'x'*100_000+'"', '[' * 5000+']' * 5000, '"\\ud800"']
OWN = 'own_sha256'


# Bytes

def place(rng, raw): return rng.randrange(len(raw)) if raw else 0
def piece(rng, raw):
    "Some bytes of a file: (first, end)."
    first = place(rng, raw)
    return first, min(len(raw), first+rng.choice((1, 2, 4, 8, 64, 1024, len(raw) or 1)))

def flip(rng, raw):
    i = place(rng, raw)
    return raw[:i]+bytes([raw[i]^1 << rng.randrange(8)])+raw[i+1:] if raw else b'\0'

def flip_early(rng, raw):
    "A bit within the first hundred bytes, where headers are."
    return flip(rng, raw[:100])+raw[100:]

def fill(rng, raw):
    a, b = piece(rng, raw)
    return raw[:a]+rng.choice((b'\0', b'\xff', b'\x7f', b'\x80'))*(b-a)+raw[b:]

def noise(rng, raw):
    a, b = piece(rng, raw)
    return raw[:a]+rng.randbytes(b-a)+raw[b:]

def drop(rng, raw):
    a, b = piece(rng, raw)
    return raw[:a]+raw[b:]

def double(rng, raw):
    a, b = piece(rng, raw)
    return raw[:b]+raw[a:b]+raw[b:]

def insert(rng, raw):
    i = place(rng, raw)
    return raw[:i]+rng.randbytes(rng.choice((1, 4, 100)))+raw[i:]

def exchange(rng, raw):
    a, b = piece(rng, raw)
    c, d = piece(rng, raw[b:])
    c, d = b+c, b+d
    return raw[:a]+raw[c:d]+raw[b:c]+raw[a:b]+raw[d:]

def cut(rng, raw): return raw[:place(rng, raw)]
def empty(rng, raw): return b''
def more(rng, raw): return raw+rng.randbytes(rng.choice((1, 8, 4096)))
def number(rng, raw):
    "A whole number of four or eight bytes, somewhere near the beginning."
    i = place(rng, raw[:200])
    kind, value = rng.choice('IiQq'), rng.choice((0, 1, -1, 2**31-1, 2**31, 2**32-1, 2**62, -2**31, 7, 1 << 20))
    size = struct.calcsize(kind)
    return raw[:i]+(value % (1 << 8*size)).to_bytes(size, 'little')+raw[i+size:]

BYTES = [flip, flip, flip_early, fill, noise, drop, double, insert, exchange, cut, empty, more, number]


# JSON

VALUE = re.compile(r'(?<=: )("(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|true|false|null)|(?<=[\[\n ])(-?\d[\d.eE+-]*)(?=,|\n)')

def seal(text):
    "Make the digest of a text fit again, as one who knows how would."
    found = re.search(rf'"{OWN}": "([^"]*)"', text)
    if not found: return text
    blank = text[:found.start(1)]+text[found.end(1):]
    return text[:found.start(1)]+hashlib.sha256(blank.encode('utf-8', 'surrogatepass')).hexdigest()+text[found.end(1):]

def value(rng, text):
    "Another value in the place of one."
    m = rng.choice(list(VALUE.finditer(text)))
    return text[:m.start()]+rng.choice(ODD_NUMBERS)+text[m.end():]

def digit(rng, text):
    m = rng.choice(list(re.finditer(r'\d', text)))
    return text[:m.start()]+str((int(m[0])+rng.randrange(1, 10)) % 10)+text[m.end():]

def entry(rng, text):
    "Another value in the place of one, whatever it holds: the tree is changed, not the text."
    tree = json.loads(text)
    at = tree
    while True:
        key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
        inner = at[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < .2: break
        at = inner
    what = rng.randrange(4)
    if what == 0: del at[key]
    elif what == 1 and isinstance(at, dict): at[rng.choice(['x', 'k', 'seed', '', '__class__', 'device', 'cache'])] = inner
    else: at[key] = rng.choice([None, True, [], {}, '', 'x', 0, -1, 1.5, 10**24, 2**31, [1]*100, [[1]], {'a': 1}, 'cuda', '../x', float('nan'), float('inf')])
    return json.dumps(tree, indent=1)+'\n'

def key(rng, text):
    "A key that stands there twice, another one, or none."
    lines = text.splitlines(keepends=True)
    i = rng.randrange(len(lines))
    what = rng.randrange(3)
    if what == 0: return ''.join(lines[:i]+[lines[i]]*2+lines[i+1:])
    if what == 1: return ''.join(lines[:i]+lines[i+1:])
    return ''.join(lines[:i]+[lines[i].replace('"', '"x', 1)]+lines[i+1:])

JSON = [value, digit, entry, key]

def mutate_json(rng, raw):
    "A change of the text, in half of the cases with a digest that fits; (bytes, does it fit?)."
    try: text = rng.choice(JSON)(rng, raw.decode())
    except (IndexError, ValueError): return flip(rng, raw), False
    sealed = rng.random() < .5
    return (seal(text) if sealed else text).encode('utf-8', 'surrogatepass'), sealed


# safetensors: eight bytes that tell the header's length, a JSON header, values

def mutate_tensors(rng, raw):
    n = int.from_bytes(raw[:8], 'little')
    header, rest = raw[8:8+n].decode(), raw[8+n:]
    what = rng.randrange(5)
    if what == 0: return rng.choice((0, 1, n-1, n+1, 2**63, 2**64-1, len(raw))).to_bytes(8, 'little')+raw[8:]
    if what == 1: new = rng.choice(JSON)(rng, header)
    elif what == 2: new = re.sub(r'"dtype":"\w+"', f'"dtype":"{rng.choice(["F64", "F16", "BF16", "I8", "U8", "BOOL", "I64", "F8_E4M3", "X"])}"', header, count=1)
    elif what == 3: new = re.sub(r'"shape":\[[^\]]*\]', f'"shape":[{rng.choice(["", "0", "1", "-1", "4294967296,4294967296", "1,1,1", "18446744073709551615"])}]', header, count=1)
    else: new = re.sub(r'"data_offsets":\[[^\]]*\]', f'"data_offsets":[{rng.choice(["0,0", "0,4", "4,0", "-1,4", "0,18446744073709551615"])}]', header, count=1)
    new = new.encode('utf-8', 'surrogatepass')
    return len(new).to_bytes(8, 'little')+new+rest


# Pickles

HOSTILE = [b"cos\nsystem\n(S'touch patchcore_nb_was_here'\ntR.", b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.", b"cbuiltins\neval\n(S'1'\ntR.", b'\x80\x04\x82\x01.', b'\x80\x02cnumpy.core.multiarray\n_reconstruct\n.', b'Ptest\n.', b'\x80\x04'+b'('*10_000+b'.', b'\x80\x04'+b']'*20_000+b'.', b'\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.', b'\x80\x04r\xff\xff\xff\x7f.', b'\x80\x04L'+b'9'*60_000+b'L\n.']

def mutate_pickle(rng, raw):
    "Hostile instructions, other values, or other bytes."
    what = rng.randrange(4)
    if what == 0: return rng.choice(HOSTILE)
    if what == 1:
        i = place(rng, raw)
        return raw[:i]+rng.choice(HOSTILE)[:-1]+raw[i:]
    if what == 2: return rng.choice(BYTES)(rng, raw)
    values = pickle.loads(raw) # our own, before anything was done to it
    name = rng.choice(list(values))
    values[name] = rng.choice([0, -1, 1, 2, 3, 7, 64, 1000, 65536, 10**9, 10**24, 1.5, None, True, 'x', '', [], [3], (3, 56), (3, 4000, 4000), (3, 65536, 65536), (1, 56, 56), ['layer9'], ['layer2'], 'resnet19', 'x'*50_000, {'a': 1}, b'x'])
    return pickle.dumps(values, protocol=rng.choice((0, 2, 4, 5)))


# Files as a whole

def gone(path): path.unlink()
def folder(path): path.unlink(), path.mkdir()
def pipe(path): path.unlink(), os.mkfifo(path)
def endless(path): path.unlink(), path.symlink_to('/dev/zero')
def outside(path): path.unlink(), path.symlink_to('/etc/hostname')
def circle(path): path.unlink(), path.symlink_to(path.name)
def sparse(path):
    "Four gigabytes, of which the disk holds what was there."
    raw = path.read_bytes()
    path.unlink() # which may be a link to a clean one
    path.write_bytes(raw)
    os.truncate(path, 4 << 30)

WHOLE = [gone, folder, pipe, endless, outside, circle, sparse]
