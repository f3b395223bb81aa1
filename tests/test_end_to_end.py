"The two promises at full size: the demo finds its defects, and the reference's script gets the reference's metrics."
import pandas as pd
import pytest

from patchcore_nb.cli import main
from patchcore_nb.demo import DEMO_CATEGORIES


def run(results, line, data):
    with pytest.raises(SystemExit) as e: main(['--gpu', '-1', *(line.split('RESULTS')[0].split()), str(results), *(line.split('RESULTS')[1].split()), str(data)])
    assert e.value.code == 0


def test_the_demo_finds_its_defects(demo_root, tmp_path):
    "`make demo` without the pictures: mean image AUROC at least 0.95, pixel AUROC at least 0.90."
    names = ' '.join(f'-d {o}' for o in DEMO_CATEGORIES)
    run(tmp_path, f'RESULTS patch_core -b filterbank -le layer2 -le layer3 sampler -p 0.1 approx_greedy_coreset dataset {names} demo', demo_root)
    table = pd.read_csv(tmp_path/'project'/'group'/'results.csv', index_col=0)
    assert list(table.index) == [*(f'demo_{o}' for o in DEMO_CATEGORIES), 'Mean']
    assert table.loc['Mean', 'instance_auroc'] >= .95 and table.loc['Mean', 'full_pixel_auroc'] >= .90
    assert (table['instance_auroc'] < 1).any() # no gift


def test_the_references_script(testdata, tmp_path, monkeypatch):
    "Its metrics, its files, the next free folder, and the same bytes again."
    monkeypatch.setenv('PATCHCORE_NB_WEIGHTS', str(testdata/'weights'))
    for _ in range(2):
        run(tmp_path, '''--seed 0 --save_patchcore_model --log_group G --log_project P RESULTS patch_core -b resnet18 -le layer2 -le layer3
            --pretrain_embed_dimension 1024 --target_embed_dimension 1024 --anomaly_scorer_num_nn 1 --patchsize 3
            sampler -p 0.01 approx_greedy_coreset dataset --resize 256 --imagesize 224 -d bottle mvtec''', testdata/'data'/'mvtec256')
    first, second = (tmp_path/'P'/o/'results.csv' for o in ('G', 'G_0'))
    assert first.read_bytes() == second.read_bytes()
    row = pd.read_csv(first).iloc[0]
    assert row['Row Names'] == 'mvtec_bottle' and row['instance_auroc'] >= .998 and abs(row['full_pixel_auroc']-.9763) < .002
    assert sorted(p.name for p in (tmp_path/'P'/'G'/'models'/'mvtec_bottle').iterdir()) == ['model.json', 'model.safetensors', 'nnscorer_search_index.faiss', 'patchcore_params.pkl']
