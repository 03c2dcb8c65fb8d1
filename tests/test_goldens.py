"""The golden files replay within the tolerances that they come with (contract C4)."""

from pathlib import Path

import pytest
import replay_goldens
from replay_trajectories import replay

HERE = Path(__file__).parent
# Every day a file of each model and block; `python tests/replay_goldens.py tests/goldens/*.json` replays all.
SLOW = ("v1_basic_cifar", "v2_symmetric_cifar", "v3_basic_lars")
TRAJECTORIES = [
    pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in SLOW else ())
    for path in sorted((HERE / "goldens").glob("*.json"))
]


@pytest.mark.parametrize("path", TRAJECTORIES)
def test_the_authors_training_run_is_repeated(path):
    beyond = [check for check in replay(path) if not check[1] <= check[2]]
    assert not beyond


def test_a_wrong_number_fails_the_replay(tmp_path, capsys):
    recorded = (HERE / "goldens/v3_vit_adamw.json").read_text()  # the one that is soonest replayed
    text = recorded.replace('"T": 0.2', '"T": 0.2001')
    assert text != recorded
    changed = tmp_path / "changed.json"
    changed.write_text(text)
    with pytest.raises(SystemExit) as end:
        replay_goldens.main([changed])
    assert end.value.code == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("changed.json ") and line.endswith(" FAIL")


def test_a_file_that_cannot_be_replayed_fails_and_the_others_are_replayed(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    assert not replay_goldens.report(tmp_path / "other.json")
    assert not replay_goldens.report(tmp_path / "missing.npz")
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["FAIL", "FAIL"]
