"A zoo of image files: each is shown to the network as a person sees it, or refused in one line."
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from patchcore_nb.core import DataError, FirstFrameWarning, read_image
from patchcore_nb.data import image_size, list_images
from patchcore_nb.patchcore import PatchCore

H, W = 24, 40
Y, X = np.mgrid[:H, :W]
GREY = (X*255//(W-1)).astype(np.uint8)                                   # (H, W) black on the left, white on the right
PLATE = np.stack([GREY, (Y*255//(H-1)).astype(np.uint8), 255-GREY], 2)   # (H, W, 3) no two corners alike
SOFT = (64+PLATE//2).astype(np.uint8)                                    # the same, of colours that every colour space holds
DEEP = GREY.astype(np.uint16)*257                                        # (H, W) the same as GREY in 16 bits
HIDDEN = (X < W//2) & (Y < H//2)                                         # transparent here: the upper left quarter
PAPER = np.where(HIDDEN[..., None], 255, PLATE)                          # PLATE with a hole, on white
COARSE = np.where(HIDDEN, 3, (X//10+4*(Y//12)) % 3).astype(np.uint8)     # (H, W) indices into COLOURS
COLOURS = np.uint8([[200, 30, 30], [30, 200, 30], [30, 30, 200], [250, 0, 250]])
TURNED = {1: PLATE, 2: PLATE[:, ::-1], 3: PLATE[::-1, ::-1], 4: PLATE[::-1], 5: PLATE.transpose(1, 0, 2), 6: np.rot90(PLATE, -1),
          7: PLATE[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(PLATE)}   # what a person sees of PLATE stored under each EXIF orientation
OTHER = Image.fromarray(255-PLATE)                                       # a second frame


def tiff(a, order='<', orientation=1):
    "An uncompressed TIFF of (H, W[, 3]) in either byte order, byte by byte: Pillow writes only some of them."
    h, w, n = a.reshape(*a.shape[:2], -1).shape
    kind, bits = {'u': 1, 'i': 2, 'f': 3}[a.dtype.kind], 8*a.itemsize
    tags = {256: w, 257: h, 258: bits, 259: 1, 262: 2 if n == 3 else 1, 273: None, 274: orientation, 277: n, 278: h, 279: a.nbytes, 339: kind}
    end = 14+12*len(tags)
    lists = {258: end, 339: end+6} if n == 3 else {}
    more = struct.pack(order+'6H', *[bits]*3, *[kind]*3) if lists else b''
    rows = [struct.pack(order+'HHII', t, 3 if t in lists else 4, n if t in lists else 1, lists.get(t, end+len(more) if v is None else v)) for t, v in tags.items()]
    head = (b'II' if order == '<' else b'MM')+struct.pack(order+'HIH', 42, 8, len(tags))
    return head+b''.join(rows)+bytes(4)+more+a.astype(a.dtype.newbyteorder(order)).tobytes()

def png(a, colour, *chunks, interlaced=False):
    "A PNG of (H, W[, n]) uint8 or uint16, interlaced (Adam7) or with further chunks, byte by byte."
    def chunk(kind, data): return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)] if interlaced else [(0, 0, 1, 1)]
    lines = b''.join(b'\0'+row.tobytes() for y, x, dy, dx in passes for row in a[y::dy, x::dx].astype(a.dtype.newbyteorder('>')) if row.size)
    head = struct.pack('>IIBBBBB', a.shape[1], a.shape[0], 8*a.itemsize, colour, 0, 0, interlaced)
    return b'\x89PNG\r\n\x1a\n'+b''.join(chunk(*o) for o in [(b'IHDR', head), *chunks, (b'IDAT', zlib.compress(lines)), (b'IEND', b'')])

def exif(orientation):
    e = Image.Exif()
    e[0x0112] = orientation
    return e

RAW = b'\nexif\n%8d\n%s\n' % (len(exif(6).tobytes()), exif(6).tobytes().hex().encode())                  # as ImageMagick writes it
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'   # as Adobe's programs do

def picture(a, mode=None): return Image.fromarray(a) if mode is None else Image.fromarray(a).convert(mode)

def alpha(a): return np.concatenate([a.reshape(H, W, -1), np.where(HIDDEN, 0, 255).astype(np.uint8)[..., None]], 2)

def junked(a):
    "`a` with noise where nobody sees it."
    return np.where(HIDDEN.reshape(H, W, *[1]*(a.ndim-2)), np.random.default_rng(0).integers(0, 256, a.shape), a).astype(np.uint8)

def palette():
    im = Image.frombytes('P', (W, H), COARSE.tobytes())
    im.putpalette(COLOURS.tobytes())
    return im

def lab(a): return ImageCms.profileToProfile(picture(a), ImageCms.createProfile('sRGB'), ImageCms.createProfile('LAB'), outputMode='LAB')

def write(path, what, options):
    if isinstance(what, bytes): path.write_bytes(what)
    else: what.save(path, **options)

def rgb(a): return np.broadcast_to(a.reshape(H, W, -1), (H, W, 3)) if a.ndim == 2 else a

# file name: (bytes, or a function to a Pillow image; options of its save; what a person sees; how far a pixel may be off)
ZOO = {f'exif-{o}.jpg': (lambda: picture(PLATE), dict(exif=exif(o), quality=95, subsampling=0), seen, 8) for o, seen in TURNED.items()}
ZOO |= {f'exif-{o}.{ending}': (lambda: picture(PLATE), dict(exif=exif(o), **more), TURNED[o], 0) for o in (3, 5, 6) for ending, more in (('png', {}), ('tif', {}), ('webp', dict(lossless=True)))}
ZOO |= {'exif-raw-profile.png': (png(PLATE, 2, (b'zTXt', b'Raw profile type exif\0\0'+zlib.compress(RAW))), {}, TURNED[6], 0),
        'exif-xmp.png': (png(PLATE, 2, (b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0'+XMP)), {}, TURNED[6], 0),
        'grey.png': (lambda: picture(GREY), {}, GREY, 0),
        'grey.jpg': (lambda: picture(GREY), dict(quality=95), GREY, 4),
        'grey-alpha.png': (lambda: picture(alpha(junked(GREY))), {}, np.where(HIDDEN, 255, GREY), 0),
        'grey-transparent.png': (png(GREY, 0, (b'tRNS', struct.pack('>H', 255))), {}, GREY, 0),
        'one-bit.png': (lambda: picture(GREY > 99), {}, (GREY > 99)*255, 0),
        'one-bit.tif': (lambda: picture(GREY > 99), dict(compression='group4'), (GREY > 99)*255, 0),
        'one-bit.bmp': (lambda: picture(GREY > 99), {}, (GREY > 99)*255, 0),
        '16-bit.png': (lambda: picture(DEEP), {}, GREY, 0),
        '16-bit-dark.png': (lambda: picture(DEEP//16), {}, np.rint(DEEP//16/257), 0), # by the range of the type, not of the picture
        '16-bit-turned.png': (lambda: picture(DEEP), dict(exif=exif(6)), np.rot90(rgb(GREY), -1), 0),
        '16-bit-alpha.png': (png(np.stack([DEEP, np.where(HIDDEN, 0, 65535)], 2).astype(np.uint16), 4), {}, np.where(HIDDEN, 255, GREY), 0),
        '16-bit-colour.png': (png(PLATE.astype(np.uint16)*257, 2), {}, PLATE, 0),
        '16-bit-little.tif': (tiff(DEEP), {}, GREY, 0),
        '16-bit-big.tif': (tiff(DEEP, '>'), {}, GREY, 0),
        '16-bit-colour.tif': (tiff(PLATE.astype(np.uint16)*257, '>'), {}, PLATE, 0),
        '16-bit.pgm': (b'P5 %d %d 65535\n' % (W, H)+DEEP.astype('>u2').tobytes(), {}, GREY, 0),
        '10-bit.pgm': (b'P5 %d %d 1023\n' % (W, H)+(GREY.astype(int)*1023//255).astype('>u2').tobytes(), {}, GREY, 1),
        '32-bit.tif': (tiff(DEEP.astype(np.int32)*32768, '>'), {}, GREY, 1),
        '32-bit-low.tif': (lambda: picture(DEEP.astype(np.int32)), {}, GREY, 0),
        '32-bit-unsigned.tif': (tiff(DEEP.astype(np.uint32)*65537), {}, GREY, 0),
        'float-1.tif': (tiff((GREY/255).astype(np.float32), '>'), {}, GREY, 0),
        'float-255.tif': (lambda: picture(GREY.astype(np.float32)), {}, GREY, 0),
        'float-nan.tif': (tiff(np.where(HIDDEN, np.nan, GREY/255).astype(np.float32)), {}, np.where(HIDDEN, 0, GREY), 0),
        'alpha.png': (lambda: picture(alpha(junked(PLATE))), {}, PAPER, 0),
        'alpha.webp': (lambda: picture(alpha(junked(PLATE))), dict(lossless=True), PAPER, 0),
        'alpha.tif': (lambda: picture(alpha(junked(PLATE))), {}, PAPER, 0),
        'half-transparent.png': (lambda: picture(np.dstack([PLATE, np.full((H, W), 128, np.uint8)])), {}, (PLATE*128.+255*127)/255, 1),
        'colour-key.png': (png(np.where(HIDDEN[..., None], [1, 2, 3], PLATE).astype(np.uint8), 2, (b'tRNS', struct.pack('>3H', 1, 2, 3))), {}, PAPER, 0),
        'palette.png': (palette, {}, COLOURS[COARSE], 0),
        'palette-index.png': (palette, dict(transparency=3), np.where(HIDDEN[..., None], 255, COLOURS[COARSE]), 0),
        'palette-bytes.png': (palette, dict(transparency=bytes([255, 255, 255, 0])), np.where(HIDDEN[..., None], 255, COLOURS[COARSE]), 0),
        'palette-index.gif': (palette, dict(transparency=3), np.where(HIDDEN[..., None], 255, COLOURS[COARSE]), 0),
        'cmyk.jpg': (lambda: picture(PLATE, 'CMYK'), dict(quality=95, subsampling=0), PLATE, 8),
        'cmyk.tif': (lambda: picture(PLATE, 'CMYK'), {}, PLATE, 0),
        'ycbcr.jpg': (lambda: picture(PLATE, 'YCbCr'), dict(quality=95, subsampling=0), PLATE, 8),
        'ycbcr.tif': (lambda: picture(PLATE, 'YCbCr'), dict(compression='tiff_lzw'), PLATE, 4),
        'lab.tif': (lambda: lab(SOFT), {}, SOFT, 12),
        'progressive.jpg': (lambda: picture(PLATE), dict(progressive=True, quality=95, subsampling=0), PLATE, 8),
        'subsampled.jpg': (lambda: picture(SOFT), dict(quality=90), SOFT, 24),
        'interlaced.png': (png(PLATE, 2, interlaced=True), {}, PLATE, 0),
        'interlaced-16.png': (png(DEEP, 0, interlaced=True), {}, GREY, 0),
        'plain.bmp': (lambda: picture(PLATE), {}, PLATE, 0), 'plain.ppm': (lambda: picture(PLATE), {}, PLATE, 0),
        'plain.pgm': (lambda: picture(GREY), {}, GREY, 0), 'plain.tga': (lambda: picture(PLATE), dict(compression='tga_rle'), PLATE, 0),
        'plain.ico': (lambda: picture(PLATE), dict(sizes=[(W, H)]), PLATE, 0), 'plain.pcx': (lambda: picture(PLATE), {}, PLATE, 0),
        'plain.webp': (lambda: picture(PLATE), dict(lossless=True), PLATE, 0), 'lossy.webp': (lambda: picture(SOFT), dict(quality=95), SOFT, 24),
        'plain.jp2': (lambda: picture(PLATE), dict(irreversible=False), PLATE, 0), '16-bit.jp2': (lambda: picture(DEEP), {}, GREY, 0),
        'plain.avif': (lambda: picture(SOFT), dict(quality=95, subsampling='4:4:4'), SOFT, 8),
        'lzw.tif': (lambda: picture(PLATE), dict(compression='tiff_lzw'), PLATE, 0), 'deflate.tif': (lambda: picture(PLATE), dict(compression='tiff_adobe_deflate'), PLATE, 0),
        'a PNG by another name.jpg': (png(PLATE, 2), {}, PLATE, 0), 'SHOUTED.PNG': (png(PLATE, 2), {}, PLATE, 0), 'Schräge Flasche №3 瓶 .png': (png(PLATE, 2), {}, PLATE, 0)}
ANIMATED = {'animated.gif': (palette, dict(append_images=[OTHER.quantize(4)], save_all=True), COLOURS[COARSE], 0),
            'animated-clear.gif': (palette, dict(append_images=[OTHER.quantize(4)], save_all=True, transparency=3), np.where(HIDDEN[..., None], 255, COLOURS[COARSE]), 0),
            'animated.png': (lambda: picture(PLATE), dict(append_images=[OTHER], save_all=True), PLATE, 0),
            'animated.webp': (lambda: picture(PLATE), dict(append_images=[OTHER], save_all=True, lossless=True), PLATE, 0),
            'pages.tif': (lambda: picture(PLATE), dict(append_images=[OTHER], save_all=True), PLATE, 0)}
NEEDS = {'webp': 'webp', 'avif': 'avif', 'jp2': 'jpg_2000', 'lab.tif': 'littlecms2', 'tif': 'libtiff'}


def make(folder, name):
    "Write one of the animals; the test is skipped where this Pillow cannot."
    lacking = [o for ending, o in NEEDS.items() if name.endswith(ending) and o not in features.get_supported()]
    if lacking: pytest.skip(f'this Pillow was built without {lacking[0]}')
    what, options, seen, tol = (ZOO | ANIMATED)[name]
    write(folder/name, what() if callable(what) else what, options)
    return folder/name, rgb(np.asarray(seen)), tol

def as_seen(path): return np.asarray(read_image(path)).astype(float)


@pytest.mark.parametrize('name', ZOO)
@pytest.mark.filterwarnings('error')
def test_zoo(tmp_path, name):
    path, seen, tol = make(tmp_path, name)
    got = as_seen(path)
    assert got.shape == seen.shape
    assert np.abs(got-seen).max() <= tol
    assert image_size(path) == seen.shape[1::-1]
    assert list_images(tmp_path) == [path]

def test_zoo_is_large_and_varied():
    assert len(ZOO)+len(ANIMATED) >= 24 and all(np.abs(TURNED[o].astype(int)-PLATE).max() > 100 for o in (2, 3, 4))

@pytest.mark.parametrize('name', ANIMATED)
@pytest.mark.filterwarnings('ignore::patchcore_nb.core.FirstFrameWarning')
def test_of_an_animation_the_first_frame(tmp_path, name):
    path, seen, tol = make(tmp_path, name)
    with Image.open(path) as im: assert im.n_frames == 2
    assert np.abs(as_seen(path)-seen).max() <= tol

def said(*args):
    "The lines about first frames that a fresh Python says."
    out = subprocess.run([sys.executable, *args], capture_output=True, text=True, encoding='utf-8', timeout=120)
    assert out.returncode == 0, out.stderr
    return [line for line in out.stderr.splitlines() if FirstFrameWarning.__name__ in line]

def test_each_kind_of_animation_is_said(tmp_path):
    "Each in a package loaded afresh, lest the first speak for all."
    paths = [make(tmp_path, name)[0] for name in ANIMATED]
    lines = said('-c', 'import importlib, sys, patchcore_nb.core as core\nfor p in sys.argv[1:]: importlib.reload(core).read_image(p)', *map(str, paths))
    assert len(lines) == len(paths) and all(str(p) in line for p, line in zip(paths, lines))

def test_many_animations_are_said_once(tmp_path):
    "A run that learns from and judges a set of animations says so once, however many threads read them."
    for i in range(6): Image.fromarray(PLATE).save(tmp_path/f'{i}.png', save_all=True, append_images=[OTHER])
    run = 'import sys\nfrom patchcore_nb.patchcore import PatchCore\nm = PatchCore("filterbank", resize=64, imagesize=64, num_workers=3, batch_size=2).fit(sys.argv[1])\nm.predict(sys.argv[1])'
    assert len(said('-c', run, str(tmp_path))) == 1


def test_the_network_sees_the_same_plate(tmp_path):
    "Whatever file the plate lies in, its score against itself is nil; upside down it is not."
    plain = [name for name, (_, _, seen, tol) in ZOO.items() if seen is PLATE and tol == 0 and not name.endswith(tuple(o for o, f in NEEDS.items() if f not in features.get_supported()))]
    model = PatchCore('filterbank', ratio=1, resize=64, imagesize=64, target_dim=128).fit(PLATE)
    scores = model.predict([*(make(tmp_path, name)[0] for name in plain), np.ascontiguousarray(PLATE[::-1])]).image_scores
    assert len(plain) > 12 and scores[:-1].max() < 1e-3*scores[-1]


PNG, BOMB = png(PLATE, 2), png(PLATE, 2).replace(struct.pack('>II', W, H), struct.pack('>II', 10**5, 10**5))
BOMB = BOMB[:29]+struct.pack('>I', zlib.crc32(BOMB[12:29]))+BOMB[33:]
UNREADABLE = {'empty.png': (b'', '0 bytes'), 'half.png': (PNG[:len(PNG)//2], 'truncated'), 'text.png': (b'not a picture', 'not an image'), 'head.png': (PNG[:20], ''),
              'bomb.png': (BOMB, 'too large'), 'page.jpg': (b'<html>404</html>', 'not an image'), 'dots.tif': (tiff(DEEP)[:60], ''), 'few.bmp': (b'BM'+bytes(20), '')}

def one_line(path, f, says=''):
    "`f` refuses `path` in one line that names it."
    with pytest.raises(DataError) as e: f(path)
    assert str(path) in str(e.value) and says in str(e.value) and len(str(e.value).splitlines()) == 1

@pytest.mark.parametrize('name', UNREADABLE)
@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_unreadable(tmp_path, name):
    content, says = UNREADABLE[name]
    (tmp_path/name).write_bytes(content)
    one_line(tmp_path/name, read_image, says)
    if name != 'half.png': one_line(tmp_path/name, image_size) # its header is whole

@pytest.mark.parametrize('name', ['exif-1.jpg', 'progressive.jpg', 'palette-index.gif', 'lzw.tif', 'plain.webp', 'plain.jp2'])
@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_cut_off(tmp_path, name):
    path, *_ = make(tmp_path, name)
    path.write_bytes(path.read_bytes()[:path.stat().st_size*2//3])
    one_line(path, read_image)

def test_a_folder_or_nothing_by_an_image_name(tmp_path):
    (tmp_path/'x.png').mkdir()
    one_line(tmp_path/'x.png', read_image)
    one_line(tmp_path/'gone.png', read_image, 'not there')
    assert list_images(tmp_path) == []

@pytest.mark.parametrize('workers', [0, 2])
def test_an_unreadable_image_among_good_ones(tmp_path, workers):
    for i in range(4): (tmp_path/f'{i}.png').write_bytes(PNG if i != 2 else PNG[:90])
    model = PatchCore('filterbank', resize=64, imagesize=64, num_workers=workers, batch_size=1)
    with pytest.raises(DataError, match='2.png'): model.fit(tmp_path)

@pytest.mark.parametrize('name', ['exif-6.jpg', 'exif-6.png', 'exif-6.tif', 'exif-6.webp', 'palette-index.gif', 'animated.png', 'animated.gif', 'animated.webp', 'pages.tif', 'lzw.tif',
                                  '16-bit.pgm', 'plain.bmp', 'plain.tga', 'plain.ico', 'plain.jp2', 'plain.avif', 'plain.pcx'])
@pytest.mark.filterwarnings('ignore')
def test_damage(tmp_path, name):
    "Whatever bytes a file holds: an image or a line, never a traceback."
    path, *_ = make(tmp_path, name)
    raw, rng = path.read_bytes(), random.Random(0)
    for _ in range(150):
        spoiled = bytearray(raw[:rng.randrange(1, len(raw)+1)] if rng.random() < .2 else raw)
        for _ in range(rng.choice([1, 1, 2, 8])): spoiled[min(int(rng.expovariate(1/60)), len(spoiled)-1)] = rng.choice([0, 1, 127, 128, 255])
        path.write_bytes(spoiled)
        found = []
        for f in (read_image, image_size):
            try: found.append(f(path))
            except DataError as e: assert len(str(e).splitlines()) == 1
        if len(found) == 2: assert found[0].size == found[1]
