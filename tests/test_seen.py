"""What the network is shown is what a person sees: deep images by one range for a set, and no crop that hides the part unsaid."""
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from patchcore_nb.base import ArgumentError, DataError
from patchcore_nb.core import read_image, to_pil
from patchcore_nb.ensemble import Ensemble
from patchcore_nb.patchcore import PatchCore
from patchcore_nb.store import load, save
from patchcore_nb.survey import ValueRangeWarning

KW = dict(layers=('layer2', 'layer3'), ratio=.3, target_dim=64, resize=64, imagesize=64, device='cpu', num_workers=0)


def texture(seed, h=72, w=72):
    "A regular surface with some noise, (h, w) float64 in 0 to 255."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    return np.clip(120+18*np.sin(x/3.1)+18*np.cos(y/4.3)+rng.normal(0, 4, (h, w)), 0, 255)


def deep(kind, seed, spot=False, gain=1.):
    "The surface as some camera writes it."
    a = texture(seed)*gain
    if kind == '12 bits': return Image.fromarray((a*16).astype(np.uint16))
    if kind == 'photons': return Image.fromarray((a*40000).astype(np.int32))
    a = {'unit': a/200, 'heat': 20+a/255*60, 'frost': a-150, 'raw': 29000+a*4}[kind]
    if spot: a[20:34, 20:34] += 2*np.ptp(a)
    return Image.fromarray(a.astype(np.float32))


def fitted(images, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return PatchCore('filterbank', **KW|kw).fit(images)


KINDS = '12 bits', 'photons', 'unit', 'heat', 'frost', 'raw'


@pytest.mark.parametrize('kind', KINDS)
def test_many_levels_are_left(kind):
    model = fitted([deep(kind, i) for i in range(8)])
    seen = np.asarray(model.view(deep(kind, 100)))
    assert len(np.unique(seen)) > 100 and 60 < seen.mean() < 200


@pytest.mark.parametrize('kind', KINDS)
def test_a_gain_is_two_grey_levels_at_most(kind):
    model = fitted([deep(kind, i) for i in range(4)])
    one, other = (np.asarray(model.view(deep(kind, 100, gain=g))).astype(int) for g in (1, 1.002))
    span = np.ptp(model.preprocess_.value_range)
    assert abs(one-other).max() <= max(2, round(255*.002*29000/span)) # what 0.2% of a value is
    again = fitted([deep(kind, i, gain=1.002) for i in range(4)]) # nor does the range leap
    third = np.asarray(again.view(deep(kind, 100, gain=1.002))).astype(int)
    assert abs(one-third).max() <= 2


@pytest.mark.parametrize('kind', ['heat', 'frost', 'unit'])
def test_a_hot_spot_darkens_nothing_else(kind):
    model = fitted([deep(kind, i) for i in range(6)])
    plain, hot = (np.asarray(model.view(deep(kind, 100, spot=o))).astype(int)[..., 0] for o in (False, True))
    assert abs(plain-hot)[45:, :].max() == 0
    scores = model.predict([deep(kind, 100+i, spot=i > 3) for i in range(8)]).image_scores
    assert scores[4:].min() > scores[:4].max()


def test_it_is_said_once_and_saved(tmp_path):
    images = [deep('12 bits', i) for i in range(4)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        model = PatchCore('filterbank', **KW).fit(images)
    assert len(said) == 1 and 'more than 8 bits' in str(said[0].message) and 'value_range=(' in str(said[0].message)
    assert model.value_range is None and model.preprocess_.value_range is not None
    save(model, tmp_path/'m')
    again = load(tmp_path/'m')
    assert again.preprocess_ == model.preprocess_ and again.value_range is None
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        seen = again.predict(images)
    torch.testing.assert_close(seen.image_scores, model.predict(images).image_scores)
    assert str(model.preprocess_.value_range) in str(said[0].message)


@pytest.mark.parametrize('odd', [[1, 0], [1], 'a', [0, 1e400], [None, 1], 5])
def test_an_odd_range_in_a_file_is_named(tmp_path, odd):
    save(fitted([deep('heat', i) for i in range(3)]), tmp_path/'m')
    path = tmp_path/'m'/'model.json'
    values = json.loads(path.read_text())
    values.pop('sha256_of_this_file', None)
    values['learned']['value_range'] = odd
    path.write_text(json.dumps(values))
    with pytest.raises(DataError): load(tmp_path/'m')


def test_a_range_of_ones_own():
    images = [deep('12 bits', i) for i in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = PatchCore('filterbank', **KW, value_range=(0, 4095)).fit(images)
    assert model.preprocess_.value_range == (0, 4095)
    middle = np.asarray(model.view(Image.new('I;16', (72, 72), 2048)))
    assert (middle == 128).all()
    model.value_range = 0, 1000
    with pytest.raises(ArgumentError): model.predict(images) # it says what the model is
    for odd in (5, (1, 0), ('a', 'b'), (0, float('nan'))):
        with pytest.raises(ArgumentError, match='value_range must be'): PatchCore('filterbank', **KW, value_range=odd).fit(images)


def test_eight_bits_stay_as_they_are():
    images = [Image.fromarray(texture(i).astype(np.uint8)) for i in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = PatchCore('filterbank', **KW).fit(images)
        assert model.preprocess_.value_range is None
        model.predict(images)
    with pytest.warns(ValueRangeWarning, match='range of their type'): model.predict([deep('12 bits', 0)]) # which the model has never seen


def test_some_deep_among_others():
    images = [Image.fromarray(texture(i).astype(np.uint8)) if i % 2 else deep('12 bits', i) for i in range(6)]
    with pytest.warns(UserWarning, match='3 of 6 images'): PatchCore('filterbank', **KW).fit(images)


def test_arrays_of_16_bits_are_images_of_16_bits():
    arrays = [np.asarray(deep('12 bits', i)) for i in range(4)]
    one, other = fitted(arrays), fitted([Image.fromarray(o) for o in arrays])
    assert one.preprocess_ == other.preprocess_ and one.preprocess_.value_range[1] < 5000
    torch.testing.assert_close(one.predict(arrays).image_scores, other.predict(arrays).image_scores)


def test_a_picture_alone_is_shown_by_its_type(tmp_path):
    deep('12 bits', 0).save(tmp_path/'a.png')
    assert np.asarray(read_image(tmp_path/'a.png')).max() < 20
    assert np.asarray(to_pil(tmp_path/'a.png', (0, 4095))).max() > 100


def test_members_agree():
    images = [deep('heat', i) for i in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = Ensemble([PatchCore('filterbank', **KW), PatchCore('filterbank', **KW|dict(patchsize=5))]).fit(images)
    assert len({o.preprocess_ for o in model.members}) == 1


# The crop

def strip(seed): return Image.fromarray(texture(seed, 100, 1600).astype(np.uint8))


def test_a_crop_that_hides_the_part_is_said():
    images = [strip(i) for i in range(3)]
    with pytest.warns(UserWarning, match=r'the network sees 6% of an image of 1600 x 100 pixels.*imagesize=None'): model = PatchCore('filterbank', **KW).fit(images)
    with pytest.warns(UserWarning, match='the network sees 6%'): model.predict(images)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        whole = PatchCore('filterbank', **KW|dict(imagesize=None)).fit(images)
        whole.predict(images)
        PatchCore('filterbank', **KW|dict(resize=256, imagesize=224)).fit([texture(i, 256, 256).astype(np.uint8) for i in range(2)]) # as the reference has it


def test_one_strip_among_squares():
    squares = [Image.fromarray(texture(i).astype(np.uint8)) for i in range(3)]
    model = PatchCore('filterbank', **KW).fit(squares)
    with pytest.warns(UserWarning, match='the network sees 6%'): model.predict([*squares, strip(9)])


# The command line

def folder_of(path, image):
    "A category of six good images, two good and two defective test images."
    for i in range(6): put(image(i, False), path/'part'/'train'/'good'/f'{i}.png')
    for i in range(2): put(image(50+i, False), path/'part'/'test'/'good'/f'{i}.png')
    for i in range(2): put(image(70+i, True), path/'part'/'test'/'spot'/f'{i}.png')
    return path


def put(im, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    im.save(path)


def spotted(seed, bad):
    a = texture(seed)*16
    if bad: a[20:34, 20:34] = 4000
    return Image.fromarray(a.astype(np.uint16))


def run(path, *more, core=('patch_core', '-b', 'filterbank', '-le', 'layer2', '-le', 'layer3', 'sampler', '-p', '0.3', 'approx_greedy_coreset')):
    "What the program says on the standard error, and its status."
    from patchcore_nb.cli import main
    try: main(['--gpu', '-1', '--save_patchcore_model', str(path/'results'), *core, 'dataset', '--resize', '64', '--imagesize', '64', *more, '-d', 'part', 'mvtec', str(path/'data')])
    except SystemExit as e: return e.code


def test_the_command_line(tmp_path, capfd):
    folder_of(tmp_path/'data', spotted)
    assert run(tmp_path) == 0
    said = capfd.readouterr().err
    assert said.count('warning: the training images have more than 8 bits') == 1 and '--value_range ' in said
    low, high = said.split('--value_range ')[1].split()[:2]
    assert 0 <= float(low) < float(high) < 5000
    assert run(tmp_path, '--value_range', '0', '4095') == 0
    assert 'more than 8 bits' not in capfd.readouterr().err
    models = [json.loads(o.read_text()) for o in sorted((tmp_path/'results').rglob('model.json'))]
    assert sorted(str(o['learned']['value_range'][1]) for o in models)[-1] == '4095.0'
    assert run(tmp_path, '--value_range', '9', '1') != 0
    assert '--value_range must be two numbers' in capfd.readouterr().err


def test_a_saved_model_has_a_range_of_its_own(tmp_path, capfd):
    folder_of(tmp_path/'data', spotted)
    run(tmp_path)
    model = next((tmp_path/'results').rglob('model.json')).parent
    from patchcore_nb.cli import main
    capfd.readouterr()
    with pytest.raises(SystemExit) as e: main([str(tmp_path/'r'), 'patch_core_loader', '-p', str(model), 'dataset', '--value_range', '0', '1', '-d', 'part', 'mvtec', str(tmp_path/'data')])
    assert e.value.code == 2 and '--value_range is for fitting' in capfd.readouterr().err


def test_the_report_says_what_is_cut_off(tmp_path, capfd):
    def long(seed, bad): return Image.fromarray(texture(seed, 100, 700).astype(np.uint8))
    folder_of(tmp_path/'data', long)
    assert run(tmp_path) == 0
    assert 'the network sees 14% of an image of 700 x 100' in capfd.readouterr().err
    page = next((tmp_path/'results').rglob('report.html')).read_text(encoding='utf-8')
    assert 'The network sees 14% of the image' in page


# What holds images

def test_tensors_of_16_bits_are_images_of_16_bits():
    tensors = [torch.from_numpy(np.array(deep('12 bits', i))) for i in range(4)]
    model = fitted(tensors)
    assert 0 < model.preprocess_.value_range[1] < 5000
    assert len(np.unique(np.asarray(model.view(tensors[0])))) > 100


def test_one_deep_image_among_many_is_found():
    images = [Image.fromarray(texture(i).astype(np.uint8)) for i in range(200)]
    images[1] = deep('12 bits', 1)
    from patchcore_nb.survey import find_value_range
    with pytest.warns(UserWarning, match='1 of 200 images'): assert find_value_range(images) is not None


def test_a_picture_that_lies_on_its_side(tmp_path):
    im = Image.fromarray(texture(0, 64, 96).astype(np.uint8)).convert('RGB')
    exif = Image.Exif()
    exif[0x0112] = 6
    im.save(tmp_path/'a.jpg', exif=exif)
    sizes = {PatchCore('filterbank', **KW|dict(imagesize=None)).fit([o]*3).preprocess_.size for o in (tmp_path/'a.jpg', Image.open(tmp_path/'a.jpg'))}
    assert sizes == {(96, 64)}


def test_the_cache_knows_how_a_deep_picture_lies(tmp_path):
    from patchcore_nb.cache import digest_image
    deep('12 bits', 0).save(tmp_path/'a.png')
    exif = Image.Exif()
    exif[0x0112] = 3
    deep('12 bits', 0).save(tmp_path/'b.png', exif=exif)
    assert len({digest_image(Image.open(tmp_path/o)) for o in ('a.png', 'b.png')}) == 2


@pytest.mark.parametrize('odd', [None, 5, b'abc', {}, np.zeros(5), torch.tensor(1.), np.zeros((0, 0, 3), np.uint8)], ids=str)
def test_what_is_no_image_is_named(odd):
    model = fitted([texture(i).astype(np.uint8) for i in range(3)])
    for call in (model.predict, PatchCore('filterbank', **KW).fit):
        with pytest.raises((ArgumentError, DataError)): call([odd])


def test_values_that_were_not_measured():
    from patchcore_nb.bit_depth import picture_span
    a = texture(0)
    a[:20] = -3.4e38
    assert picture_span(a)[0] > 0 and picture_span(np.full((4, 4), -3.4e38)) is None


def test_what_is_said_is_what_is_used():
    images = [deep('unit', i) for i in range(4)]
    with pytest.warns(UserWarning) as said: found = PatchCore('filterbank', **KW).fit(images).preprocess_.value_range
    assert str(found) in str(said[0].message)


@pytest.mark.parametrize('far', [1e3, 1e6, 1e9])
def test_a_small_span_far_from_zero_is_seen(far):
    images = [Image.fromarray((far+texture(i)).astype(np.int32)) for i in range(4)]
    model = fitted(images)
    assert len(np.unique(np.asarray(model.view(images[0])))) > 50


def test_more_images_are_looked_at_too():
    model = fitted([Image.fromarray(texture(i).astype(np.uint8)) for i in range(4)])
    with pytest.warns(ValueRangeWarning): model.partial_fit([deep('12 bits', 9)])


def test_a_bank_of_clusters_has_no_twins():
    from patchcore_nb.approximate import measure_recall
    g = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.randn(1000, 32, generator=g)*.05+c*20*torch.randn(32, generator=g) for c in (1, 2, 3)])
    def blind(queries, k=1): # finds a row of the right cluster, hardly ever the nearest
        near = torch.cdist(queries, rows).topk(k+50, largest=False)
        return near.values[:, -k:], near.indices[:, -k:]
    assert measure_recall(blind, rows, 200) < .5
