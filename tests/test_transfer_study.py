"""The study of transfer: what is made and run, what is skipped, what is said."""

import csv
import json

import pytest

from benchmarks import side_by_side, transfer
from moco_tf import config as config_lib
from moco_tf.evaluate import finetune
from moco_tf.transfer import detect, segment

FIGURES = dict.fromkeys(transfer.NAMES, "50.0") | {"seconds": "9"}


def settings(tmp_path, **values):
    (tmp_path / "wheel").touch()
    own = {"wheel": f"{tmp_path}/wheel", "runs": f"{tmp_path}/runs", "output": f"{tmp_path}/output"}
    return transfer.Settings(**own | values)


def arguments(tmp_path, *more):
    return [f"--runs={tmp_path / 'runs'}", f"--output={tmp_path / 'output'}", *more]


def known(**figures):
    """Runs of composite_detect at 10 %, whose AP50 are given by init, a list of seeds' each."""
    return {
        (init, 10, 300, seed): FIGURES | {"ap50": str(value)}
        for init, values in figures.items()
        for seed, value in enumerate(values)
    }


def test_the_whole_study_has_a_run_an_encoder_share_and_seed_and_no_folder_twice(tmp_path):
    chosen = settings(tmp_path)
    points = [(name, *key) for name in transfer.SETS for key in transfer.keys(chosen, name)]
    assert len(points) == (4 + 3 + 3) * 3 * 3
    outputs = {transfer.words(chosen, *point)[-1] for point in points}
    prepared = {folder for stage in transfer.preparations(chosen, transfer.SETS) for folder in stage}
    assert len(outputs) == len(points) and not prepared & set(transfer.SETS)


def test_runs_that_are_compared_differ_in_nothing_but_where_they_start(tmp_path):
    for name, one in transfer.SETS.items():
        for init in one.inits:
            program, *flags = transfer.words(settings(tmp_path), name, init, 10, 300, 0)
            values = dict(flag.partition("=")[::2] for flag in flags)
            assert program == f"moco_tf.transfer.{one.task}"
            assert {flag: values[flag] for flag in values if flag not in ("--encoder", "--init", "--output")} == {
                **{"--dataset": f"{tmp_path}/runs/{one.data}", "--train_split": "train", "--eval_split": "test"},
                **{"--labels": "10", "--seed": "0", "--steps": "300", "--batch_size": "8", "--image_size": "96"},
                **dict(flag.split("=") for flag in transfer.HEADS[one.task]),
            }
            transfer.command.parse({"detect": detect, "segment": segment}[one.task].Settings, program, flags)


def test_every_encoder_is_made_by_a_sound_command_before_what_needs_it(tmp_path):
    data, moco, supervised = transfer.preparations(settings(tmp_path), transfer.SETS)
    assert set(data) == {one.data for one in transfer.SETS.values()}
    configs = {folder: config_lib.parse(words[1:]) for folder, words in moco.items()}
    network = {(config.arch, config.width, config.stem) for config in configs.values()}
    assert network == {("resnet10", 16, "imagenet")}  # so a random start is the same for all
    ((program, *flags),) = supervised.values()
    labelled = transfer.command.parse(finetune.Settings, program, flags)
    assert labelled.epochs == configs["moco_cifar"].epochs and labelled.init == "random" and labelled.labels == 100
    assert configs["moco_tiles"].dataset == f"{tmp_path}/runs/tree_crowns/unlabelled"  # of training tiles alone
    made = {*moco, *(f"{folder}/model.keras" for folder in supervised), "encoder", "random"}
    assert made >= {place for one in transfer.SETS.values() for start in one.inits.values() for place in start}
    (_, moco, supervised) = transfer.preparations(settings(tmp_path), ["composite_segment"])
    assert list(moco) == ["moco_cifar"] and list(supervised) == ["supervised"]


def test_what_is_made_already_is_not_made_again(tmp_path, monkeypatch):
    chosen, asked = settings(tmp_path), []
    (tmp_path / "runs/composite/annotations").mkdir(parents=True)
    finished, begun = (tmp_path / "runs" / name for name in ("moco_cifar", "moco_tiles"))
    for run, epoch in ((finished, 20), (begun, 1)):
        run.mkdir()
        (run / "config.flags").write_text("--epochs=20\n")
        (run / "metrics.csv").write_text(f"epoch,loss\n{epoch},1\n")
    monkeypatch.setattr(side_by_side, "failure", lambda words, cores: asked.append(words[-1].rpartition("/")[2]))
    assert transfer.prepare(chosen, transfer.SETS) == 0
    assert asked == ["tree_crowns", "moco_tiles", "supervised"]


def test_where_preparing_fails_nothing_is_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(side_by_side, "failure", lambda words, cores: "no such file")
    assert transfer.main(arguments(tmp_path, "--set=composite_detect")) == 1
    said = capsys.readouterr().out
    assert "composite: failed: no such file" in said and "moco_cifar" not in said and "seed" not in said


def test_runs_that_stand_in_the_csv_are_not_run_again(tmp_path, monkeypatch, capsys):
    asked = []

    def failure(words, cores):
        asked.append(words)
        output = transfer.Path(words[-1].partition("=")[2])
        output.mkdir(parents=True, exist_ok=True)
        (output / "summary.json").write_text(json.dumps({"miou": 40.0 + len(asked)}))

    monkeypatch.setattr(side_by_side, "failure", failure)
    given = arguments(tmp_path, "--set=composite_segment", "--labels=10", "--seeds=0,1")
    assert transfer.main(given) == 0
    runs = [words for words in asked if words[0] == "moco_tf.transfer.segment"]
    assert len(runs) == 6 and len(asked) == 6 + 3
    with open(tmp_path / "output/composite_segment.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and {row["init"] for row in rows} == {"random", "MoCo", "supervised"}
    assert all(row["miou"] and not row["ap"] for row in rows)
    assert (tmp_path / "output/composite_segment.png").exists()
    asked.clear()
    assert transfer.main(given) == 0 and not asked
    assert "0 runs to do of 6" in capsys.readouterr().out
    (tmp_path / "output/composite_segment.csv").unlink()
    assert transfer.main(given) == 0 and not [
        words for words in asked if "segment" in words[0]
    ]  # their files are there


def test_jobs_share_the_cores_and_a_failed_command_is_known_by_its_last_line():
    given = dict(side_by_side.done(range(6), 2, lambda point, cores: cores))
    assert sorted(given) == list(range(6)) and set().union(*given.values()) == side_by_side.os.sched_getaffinity(0)
    assert side_by_side.failure(["platform"], given[0]) is None
    assert "No module named no_such" in side_by_side.failure(["no_such"], given[0])


def test_a_run_that_fails_is_named_and_the_others_are_kept(tmp_path, monkeypatch, capsys):
    def run(settings, point, cores):
        return (None, "failed: x") if point[1] == "MoCo" else (FIGURES, "fine")

    monkeypatch.setattr(transfer, "prepare", lambda settings, sets: 0)
    monkeypatch.setattr(transfer, "run", run)
    assert transfer.main(arguments(tmp_path, "--set=composite_detect", "--labels=30", "--seeds=7")) == 1
    assert "composite_detect, MoCo, 30 %, seed 7: failed: x" in capsys.readouterr().out
    assert len((tmp_path / "output/composite_detect.csv").read_text().splitlines()) == 1 + 2


def test_a_csv_gives_back_what_was_written(tmp_path):
    runs = known(random=[10, 12], MoCo=[11])
    transfer.write(tmp_path / "a/b.csv", runs)
    assert transfer.recorded(tmp_path / "a/b.csv") == runs and transfer.recorded(tmp_path / "none.csv") == {}


def test_the_table_has_means_and_standard_deviations_of_the_seeds():
    lines = transfer.table("composite_detect", known(MoCo=[20, 22, 24], random=[10])).splitlines()
    assert lines[0] == "| labels | encoder | AP50 | AP50, any class | AP | AP75 | seeds |"
    assert lines[2] == "| 10 % | random | 10.0 | 50.0 | 50.0 | 50.0 | 1 |"
    assert lines[3] == "| 10 % | MoCo | 22.0 ± 2.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 3 |"


def test_gains_are_differences_of_runs_with_the_same_seed():
    said = transfer.gains("composite_detect", known(random=[10, 20, 30], MoCo=[12, 23, 34], supervised=[9]))
    assert said.splitlines() == [
        "10 %: MoCo +3.0 AP50 from random (standard error 0.6).",
        "10 %: supervised -1.0 AP50 from random (one seed).",
    ]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--set=voc"], "--set lists sets, of trees, composite_detect, composite_segment; got voc"),
        (["--wheel=none"], "--wheel names a file, which --set=trees needs; got none"),
        (["--labels=0"], "--labels lists percentages, 1 to 100; got (0,)"),
        (["--seeds=-1"], "--seeds lists numbers from 0 up"),
        (["--jobs=0"], "--jobs is more than 0; got 0"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(tmp_path, capsys, words, message):
    assert transfer.main([*arguments(tmp_path), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
