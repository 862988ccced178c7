import io

import pytest
from rich.console import Console

from timm_selfdistill.evaluation.tables import render_table


@pytest.mark.parametrize('agreement, stage', [(False, 'layer4'), (True, 'stages.3.downsample')])
def test_no_figure_is_cut_short_on_eighty_columns(agreement, stage):
    row = dict(
        exit='ensemble', stage=stage, params=25.56e6, macs=12_345e6, share=1.234, top1=99.99, top5=100., loss=10.123,
        ece=43.33, aurc=13.06, agreement=agreement)
    text = io.StringIO()
    Console(file=text, width=80).print(render_table([row, dict(row, stage='all exits', macs=37e6)], 'test split'))
    assert '…' not in text.getvalue()
    for figure in ('25.56M', '12.35G', '37.0M', '123.4', '99.99', '100.00', '10.123', '43.33', '13.06', 'all exits'):
        assert figure in text.getvalue()
