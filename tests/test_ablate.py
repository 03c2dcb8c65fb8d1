"""The ablations: what is run, what is skipped, what is said."""

import csv

import pytest

from benchmarks import ablate
from moco_tf import config as config_lib


def known(values, epochs=4):
    return {
        (flags, epochs, seed): dict.fromkeys(ablate.COLUMNS[5:], "0.1") | {"knn_top1": str(value)}
        for flags, seeds in values.items()
        for seed, value in enumerate(seeds)
    }


def test_each_point_is_a_sound_run_that_begins_with_the_file_it_varies():
    for file in {study.base for study in ablate.STUDIES.values()}:
        studies = [study for study in ablate.STUDIES.values() if study.base == file]
        base = f"--flagfile={ablate.REPOSITORY / file}"
        plain = config_lib.parse([base])
        for text in {ablate.name(point.flags) for study in studies for point in study.points}:
            changed = {line.partition("=")[0] for line in text.split()}
            differing = {f"--{name}" for name in config_lib.parse([base, *text.split()]).differences(plain)}
            own = {"--pretext", "--head"} if "--pretext" in changed else set()  # of tasks with flags of their own
            assert changed - own <= differing, text  # none says what is so anyway
            of_task = {"--loss", "--positives_from"} if "--pretext" in changed else set()  # by name alone MoCo's
            assert differing <= changed | of_task, text
    assert config_lib.parse([f"--flagfile={ablate.REPOSITORY}/configs/ablate.flags"]).epochs == ablate.Settings.epochs


def test_rates_keep_their_proportion_to_the_one_of_the_base():
    study = ablate.STUDIES["mechanism"]
    assert ablate.at_rate(study, ablate.RATE) == study
    names = [ablate.name(point.flags) for point in ablate.at_rate(study, 2 * ablate.RATE).points]
    assert "--method=end_to_end --batch_size=512 --lr=0.24" in names
    assert "--method=memory_bank --lr=0.006 --queue_size=128" in names


def test_every_ordering_is_about_points_of_its_study():
    for study in ablate.STUDIES.values():
        places = {(point.series, point.x) for point in study.points}
        assert len(places) == len(study.points)
        assert all(better in places and worse in places for better, worse in study.orderings)


def test_points_that_stand_in_any_studys_csv_are_not_run_again(tmp_path, monkeypatch, capsys):
    momentum = ablate.STUDIES["momentum"]
    values = known({ablate.name(point.flags): [40.0 + i, 41.0] for i, point in enumerate(momentum.points)})
    ablate.write(tmp_path / "momentum.csv", momentum, values)
    assert ablate.recorded(tmp_path, momentum.base) == values
    asked = []

    def run(settings, seed, flags, cores):
        asked.append((seed, flags))
        return values["", 4, 0], "done"

    monkeypatch.setattr(ablate, "run", run)
    arguments = [f"--output={tmp_path}", "--study=queue_size", "--seeds=0", "--jobs=2"]
    assert ablate.main(arguments) == 0
    assert set(asked) == {(0, f"--queue_size={size}") for size in (128, 512, 1024, 8192)}
    with open(tmp_path / "queue_size.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and {row["seed"] for row in rows if row["x"] == "4096"} == {"0", "1"}
    assert (tmp_path / "queue_size.png").exists()
    asked.clear()
    assert ablate.main(arguments) == 0 and not asked
    assert "0 runs to do of 5" in capsys.readouterr().out


def test_a_run_that_fails_is_named_and_the_others_are_kept(tmp_path, monkeypatch, capsys):
    good = known({"": [40.0]})["", 4, 0]
    monkeypatch.setattr(
        ablate, "run", lambda s, seed, flags, cores: (None, "failed: x") if flags.endswith("=0.9") else (good, "fine")
    )
    assert ablate.main([f"--output={tmp_path}", "--study=momentum", "--seeds=3"]) == 1
    assert "--momentum=0.9, seed 3: failed: x" in capsys.readouterr().out
    assert len((tmp_path / "momentum.csv").read_text().splitlines()) == 1 + 4


def test_the_sentence_counts_what_is_beyond_twice_the_standard_error():
    study = ablate.STUDIES["momentum"]
    series = "queue (MoCo)"
    values = {  # a spread of 0.5 ** 0.5 in each: an error of 0.71 in differences of two seeds
        (series, x): [mean - 0.5, mean + 0.5]
        for x, mean in (("0", 30.0), ("0.9", 40.0), ("0.99", 40.5), ("0.999", 35.0))
    }
    said = ablate.verdict(study, values)
    assert "Of the paper's 3 orderings 1 held (seeds spread by 0.71 points" in said
    assert "Held: 0.9 over 0 (+10.0). Reversed: 0.999 over 0.99 (-5.5). Not told apart: 0.99 over 0.9 (+0.5)." in said
    assert "One seed" in ablate.verdict(study, {place: v[:1] for place, v in values.items()})


def test_a_finished_runs_figures_are_read_off_its_files(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,knn_top1,loss,feature_std\n1,,2.0,0.1\n2,40.5,1.5,0.2\n")
    (tmp_path / "baselines.json").write_text('{"untrained": 27.5}')
    said = "Wall time 20 s: start 9.9, preparing epochs 1.5, steps 6.0, waiting for images 1.2, evaluation 1.0, "
    (tmp_path / "train.log").write_text(f"{said}saving 0.2, other 0.9.\n")
    (tmp_path / "probe_top1").mkdir()
    (tmp_path / "probe_top1/summary.json").write_text('{"top1": 44.25}')
    found = ablate.figures(tmp_path, 2)
    assert found["seconds"] == "9.6" and found["probe_top1"] == "44.25" and found["finetune_top1"] == ""
    assert found["knn_top1"] == "40.5" and found["contrast_top1"] == "" and found["untrained_knn_top1"] == "27.5"
    assert ablate.figures(tmp_path, 3) is None
    (tmp_path / "train.log").write_text(f"Wall time 3 s: steps 2.0.\nGoing on from step 3 of 6.\n{said}other 0.9.\n")
    assert ablate.figures(tmp_path, 2)["seconds"] == ""  # the first part's are not all known


def test_runs_of_two_bases_lie_in_two_folders_and_one_run_at_two_places_counts_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ablate, "run", lambda settings, *_: asked.append(settings.runs) or (None, "failed: x"))
    for study in ("mechanism", "pretext", "mae"):
        ablate.main([f"--output={tmp_path}", f"--study={study}", "--seeds=0"])
    assert set(asked) == {"runs/ablate", "runs/pretext", "runs/mae_moco"}
    study = ablate.STUDIES["mae"]  # two runs stand at two places each
    places = [(point.series, point.x) for point in study.points]
    apart, alike = [30.0, 34.0], [40.0, 40.0]
    values = {place: apart if place[1].startswith(("0: ", "0.1", "10", "0.25")) else alike for place in places}
    assert "spread by 2.00 points" in ablate.verdict(study, values)  # the root of 4 * 8 / 8, and not of 32 / 10


def test_rows_at_equal_time_survive_the_next_point_at_equal_images(tmp_path):
    study = ablate.STUDIES["pretext"]
    names = [ablate.name(point.flags) for point in study.points]
    values = known({names[0]: [40.0], names[1]: [30.0], f"{names[1]} --epochs=2": [35.0]})
    for (flags, _, _), row in values.items():
        row["seconds"] = "100" if flags == names[0] else "200"
    ablate.write(tmp_path / "pretext.csv", ablate.at_equal_time(study, values, 4), values)
    before = (tmp_path / "pretext.csv").read_text().splitlines()
    assert sum(line.startswith(ablate.TIME) for line in before) == 2
    ablate.write(tmp_path / "pretext.csv", study, values)
    assert sorted((tmp_path / "pretext.csv").read_text().splitlines()) == sorted(before)


def test_at_equal_time_a_slower_task_has_as_many_epochs_as_fit():
    study = ablate.STUDIES["pretext"]
    names = [ablate.name(point.flags) for point in study.points]
    values = known({names[0]: [40.0, 41.0], names[1]: [30.0], names[2]: [35.0]})
    for (flags, _, _), row in values.items():
        row["seconds"] = {names[0]: "100", names[1]: "250", names[2]: "102"}[flags]
    found = [point for point in ablate.at_equal_time(study, values, 4).points if point.series == ablate.TIME]
    assert [point.x for point in found] == [point.x for point in study.points[:3]]
    assert [point.flags.get("epochs") for point in found] == [None, "2", None]
    assert "| equal images | crops | " in ablate.judged_table(study, values, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--study=heads"], "--study=heads: value should be one of <mechanism|"),
        (["--jobs=0"], "--jobs is more than 0; got 0"),
        (["--seeds=-1"], "--seeds lists numbers from 0 up"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(capsys, arguments, message):
    assert ablate.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
