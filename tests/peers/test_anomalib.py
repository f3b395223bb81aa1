"The preset anomalib against anomalib itself, on the same tensors: `make peers`, in an environment of its own. Skipped where anomalib is not installed."
import csv
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

pytest.importorskip('anomalib', reason='anomalib is not installed: make peers compares with it, in an environment of its own')

from anomalib.models.components import KCenterGreedy
from anomalib.models.image.patchcore.torch_model import PatchcoreModel

from patchcore_nb.aggregator import Aggregator
from patchcore_nb.demo import demo_sample
from patchcore_nb.names import PRESETS
from patchcore_nb.presets import preset
from patchcore_nb.samplers import project_sparse, single_start

FOUND = Path(__file__).resolve().parents[2]/'benchmarks'/'results'/'peers.csv'

@pytest.fixture(scope='module')
def said():
    "What was compared, and the largest deviation; written at the end."
    rows = []
    yield rows
    if len(rows) < 6: return # some alone
    with open(FOUND, 'w', newline='') as f:
        writer = csv.writer(f)
        writer.writerow(['peer', 'version', 'what', 'largest deviation'])
        for what, far in rows: writer.writerow(['anomalib', version('anomalib'), what, f'{far:.1e}'])

@pytest.fixture(scope='module')
def ours():
    images = [demo_sample('cog', 'train', i)[0] for i in range(8)]
    return preset('anomalib', backbone='resnet18', weights='random', ratio=.02, num_workers=0, device='cpu').fit(images)

@pytest.fixture(scope='module')
def theirs(ours):
    model = PatchcoreModel(layers=['layer2', 'layer3'], backbone='resnet18', pre_trained=False, num_neighbors=9).eval()
    model.memory_bank = ours.memory_bank_.clone()
    return model

@pytest.fixture(scope='module')
def images(): return [demo_sample('cog', 'test', i)[0] for i in range(6, 18)]

def relative(a, b): return float(((a-b).abs().max()/b.abs().max()))

def test_preprocessing(ours, images):
    "The whole image at 256 x 256, ImageNet's mean and deviation."
    from anomalib.models import Patchcore
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor, to_dtype
    steps = Patchcore.configure_pre_processor().transform
    image = Image.fromarray(images[0])
    assert torch.allclose(ours.embedder_.read(images[0]), steps(to_dtype(pil_to_tensor(image), scale=True)), atol=1e-5)

def test_embeddings(said, theirs):
    "From the same feature maps."
    g = torch.Generator().manual_seed(0)
    maps = dict(layer2=torch.randn(2, 128, 32, 32, generator=g), layer3=torch.randn(2, 256, 16, 16, generator=g))
    want = theirs.generate_embedding({k: theirs.feature_pooler(v) for k, v in maps.items()}).permute(0, 2, 3, 1)
    args = {k: PRESETS['anomalib'][k] for k in ('patchsize', 'pretrain_dim', 'target_dim', 'stride', 'preprocessing', 'aggregation')}
    got = Aggregator(**args).fit([128, 256])(maps)
    said.append(('patch embeddings', relative(got, want)))
    assert said[-1][1] < 1e-5

@pytest.mark.parametrize('dtype, most', [(torch.float64, 1e-5), (torch.float32, 1e-3)])
def test_scores(said, ours, theirs, images, dtype, most):
    "From the same patches and the same bank. In float32 anomalib's own distances are rounded where they are small, so that its scores in float64 are the measure."
    patches = torch.cat(list(ours.embedder_(images)))
    rows = patches.flatten(0, 2).to(dtype)
    theirs.memory_bank = ours.memory_bank_.to(dtype)
    dists, at = theirs.nearest_neighbors(embedding=rows, n_neighbors=1)
    per_image = [o.reshape(len(images), -1) for o in (dists, at)]
    want = theirs.compute_anomaly_score(*per_image, rows)
    got = ours.predict(images)
    where = str(dtype).removeprefix('torch.')
    said.append((f'patch scores, anomalib in {where}', relative(got.patch_scores.flatten(1), per_image[0])))
    said.append((f'image scores, anomalib in {where}', relative(got.image_scores, want)))
    assert max(o for _, o in said[-2:]) < most

def test_coreset(said, monkeypatch):
    "The same rows in the same order, from the same projection and the same first row."
    x = torch.randn(3000, 64, generator=torch.Generator().manual_seed(1))
    low, first = project_sparse(x, .9, 5), single_start(x, [1], 5, False).idxs
    class Projection:
        def fit(self, rows): return self
        def transform(self, rows): return low
    sampler = KCenterGreedy(x, .1)
    sampler.model = Projection()
    monkeypatch.setattr(torch, 'randint', lambda *args, **kw: first.clone())
    want = torch.as_tensor([int(o) for o in sampler.select_coreset_idxs()])
    got = single_start(x, [300], 5, False).idxs
    said.append(('coreset: share of other picks', 1-len(set(got.tolist()) & set(want.tolist()))/300))
    assert said[-1][1] <= .01 and got[0] == want[0]
