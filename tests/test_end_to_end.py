"The promise at full size: the demo finds its defects. (Budgets have the reference's script.)"
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
