"""A thousand damaged images of eight formats: `python tests/campaigns/images.py`.

Each is asked for its scores in a process of its own, from the file and from Pillow, and goes through the header check of a
run. It is judged, with scores that are numbers, or refused by one line that names it: no signal, no hang, not twice
the memory, no other exception, no code.
"""
import io
import os
import random
import tempfile
import warnings
from pathlib import Path

import attempts
import mutate
from attempts import End

os.environ.setdefault('OMP_NUM_THREADS', '1') # processes are forked, and threads do not survive that

FORMATS = {'png': {}, 'jpeg': dict(quality=90), 'bmp': {}, 'tiff': dict(compression='tiff_lzw'), 'webp': {}, 'gif': {}, 'png of 16 bits': {}, 'tiff of floats': {}}


def make_images(seed):
    "A whole image of each format, as bytes."
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(seed)
    soft = np.asarray(Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((96, 80), Image.Resampling.BICUBIC))
    deep, floats = soft[..., 0].astype(np.uint16)*257, soft[..., 0].astype(np.float32)/255
    found = {}
    for name, how in FORMATS.items():
        values = deep if '16' in name else floats if 'floats' in name else soft
        out = io.BytesIO()
        Image.fromarray(values).save(out, name.partition(' ')[0].upper(), **how)
        found[name] = out.getvalue()
    return found

class Work:
    "What is done with one image."
    def __init__(self, model): self.model = model
    def __call__(self, job):
        import torch
        from patchcore_nb.data import image_size
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            image_size(job[2])
            found = self.model.predict([job[2]])
        if not torch.isfinite(found.image_scores).all() or not torch.isfinite(found.anomaly_maps).all(): return End('NO NUMBER')
        return End('judged')

def jobs(whole, home, n, seed):
    "Damage images one by one; (format, case, path)."
    names = list(whole)
    for case in range(n):
        rng, name = random.Random(f'{seed}/{case}'), names[case % len(names)]
        raw = whole[name]
        for _ in range(rng.choice((1, 1, 1, 3))): raw = rng.choice(mutate.BYTES)(rng, raw)
        path = home/f'{case}.{name.partition(" ")[0]}'
        path.write_bytes(raw)
        yield name, case, path

def campaign(n, seed, workers, home):
    "Try n damaged images; how they ended."
    import numpy as np
    import torch
    from PIL import Image
    from patchcore_nb import PatchCore
    torch.set_num_threads(1)
    Image.init() # all formats, which are otherwise imported when a file asks for them
    whole = make_images(seed)
    model = PatchCore('filterbank', resize=64, imagesize=64, pretrain_dim=64, target_dim=64, ratio=.1, num_workers=0)
    model.fit(np.random.default_rng(seed).integers(0, 256, (4, 64, 64, 3), np.uint8))
    work, clean = Work(model), {}
    for name, raw in whole.items():
        path = home/f'whole.{name.partition(" ")[0]}'
        path.write_bytes(raw)
        list(map(work, [(name, 0, path)])) # what is imported at the first image is there then
        (_, end), = attempts.in_children(work, [(name, 0, path)], 1)
        assert end.what == 'judged', f'{name}: {end}'
        clean[name] = end.growth
    tally = attempts.Tally()
    for (name, case, path), end in attempts.in_children(work, jobs(whole, home, n, seed), workers):
        if end.what == 'refused' and path.name not in end.more: end = End('NOT NAMED', end.more)
        tally.add(name, f'case {case}', attempts.too_much(end, clean[name]))
        path.unlink()
    return tally


if __name__ == '__main__':
    asked = attempts.arguments(1000)
    with tempfile.TemporaryDirectory() as home: raise SystemExit(campaign(asked.n, asked.seed, asked.workers, Path(home)).tell('images', asked))
