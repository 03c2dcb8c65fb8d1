"""`python -m moco_tf.evaluate.sts --encoder=RUN --pairs=FILE.tsv`: do sentences of one meaning get similar features?

The measure is semantic textual similarity: Spearman's correlation, times 100, between the cosine of two sentences'
features and the score that people gave the pair, over all pairs of the file. A line of the file is
`score<TAB>sentence<TAB>sentence`. The command also computes two measures without an encoder: the cosine of tf-idf
vectors, and the number of words in both sentences divided by the number in either. Writes summary.json, and pairs.csv
with the cosines of each pair. It needs scikit-learn, from the extra `eval`.
"""

import csv
import dataclasses
import io
import logging
import math
import sys
from pathlib import Path

from moco_tf import command, files, run_folder
from moco_tf.command import ConfigError, flag
from moco_tf.evaluate import settings as common

log = logging.getLogger("moco_tf")
BATCH = 256


@dataclasses.dataclass(frozen=True)
class Settings:
    encoder: str = flag("", "What to judge: a run folder, or an exported SavedModel, of sentences.", path=True)
    pairs: str = flag("", "Text file of pairs, score<TAB>sentence<TAB>sentence each.", path=True)
    output: str = flag("", "Folder for the results. '': sts in the run, or <DIR>-sts beside a SavedModel.", path=True)

    def __post_init__(self):
        command.check_values(self)
        for name, what in (("encoder", "a run folder or a SavedModel"), ("pairs", "a text file of scored pairs")):
            if not getattr(self, name):
                raise ConfigError(f"--{name}=PATH names {what}")

    def resolved(self):
        """Returns these settings with the output filled in."""
        path = Path(self.encoder)
        own = common.results_of(path, "sts", bool(run_folder.recorded(path)))
        return dataclasses.replace(self, output=self.output or str(own))


def main(arguments):
    """Runs the command; returns the process's exit status."""
    return common.run("moco_tf.evaluate.sts", __doc__, Settings, judge, arguments)


def judge(settings):
    """Computes the correlations and writes the results; returns {measure: Spearman's correlation times 100}."""
    try:
        import numpy as np
        import scipy.stats
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"correlations need {error.name}: pip install 'moco_tf[eval]'") from None
    from moco_tf.evaluate import subject

    scores, firsts, seconds = read(Path(settings.pairs))
    encoder, _ = subject.encoder(settings)
    if encoder.preprocessing.unit != "sentences":
        raise ConfigError(f"--encoder={settings.encoder} is of images; pairs of sentences need one of text")
    one, other = (encode(encoder, texts) for texts in (firsts, seconds))
    cosines = {
        "encoder": cosine(one, other),
        "encoder, less the mean": cosine(*_less_their_mean(one, other)),
        "tf-idf": tf_idf(words(firsts), words(seconds)),
        "words in common": overlap(words(firsts), words(seconds)),
    }
    if not np.isfinite(cosines["encoder"]).all() or np.ptp(cosines["encoder"]) == 0:
        raise ConfigError(
            f"--encoder={settings.encoder} gives all pairs one cosine, or numbers that are not finite: its training "
            "has collapsed or diverged; try a lower --lr"
        )
    found = {
        name: round(100 * float(scipy.stats.spearmanr(scores, of).statistic), 2)
        for name, of in cosines.items()
        if np.ptp(of)  # pairs that share no words tell nothing apart
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["score", *cosines, "first", "second"])
    columns = [[f"{value:.6g}" for value in of] for of in cosines.values()]
    writer.writerows(zip(scores, *columns, firsts, seconds, strict=True))
    files.write_text(Path(settings.output) / "pairs.csv", text.getvalue())
    facts = {"pairs": len(scores), "file": settings.pairs, "encoder": settings.encoder}
    files.write_json(Path(settings.output) / "summary.json", {"spearman": found} | facts)
    log.info(
        f"Spearman x 100 on {len(scores)} pairs: {', '.join(f'{n} {v:.1f}' for n, v in found.items())}. "
        f"{settings.output}"
    )
    return found


def read(path):
    """Reads (scores, first sentences, second sentences) from a file of pairs.

    Raises:
      ConfigError: the file cannot be read, a line has another form, or the scores are all the same.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"--pairs={path} cannot be read: {reason}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        score, *sentences = line.split("\t")
        try:
            score = float(score)
        except ValueError:
            score = math.nan
        if not math.isfinite(score) or len(sentences) != 2 or not all(sentence.strip() for sentence in sentences):
            raise ConfigError(f"line {number} of {path} is not score<TAB>sentence<TAB>sentence; got {line[:60]!r}")
        rows.append((score, *sentences))
    if len({score for score, *_ in rows}) < 2:
        raise ConfigError(f"{path} has pairs of at least two different scores, or there is nothing to order")
    return tuple(map(list, zip(*rows, strict=True)))


def encode(encoder, texts):
    """Returns the features (N, C) of texts, a NumPy array."""
    import numpy as np
    import tensorflow as tf

    batches = [texts[first : first + BATCH] for first in range(0, len(texts), BATCH)]
    return np.concatenate(
        [encoder.encode(encoder.preprocessing(tf.constant(batch)))["features"].numpy() for batch in batches]
    )


def cosine(one, other):
    """Returns the cosines (N,) of the rows of two arrays (N, C); 0 where one of the two rows is 0."""
    import numpy as np

    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.einsum("nc,nc->n", one, other) / np.where(lengths, lengths, 1)


def _less_their_mean(one, other):
    mean = (one.mean(axis=0) + other.mean(axis=0)) / 2
    return one - mean, other - mean


def tf_idf(firsts, seconds):
    """Returns the cosines (N,) of tf-idf vectors of lists of words; the idf comes from these sentences."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer=list).fit([*firsts, *seconds])
    one, other = vectorizer.transform(firsts), vectorizer.transform(seconds)  # of unit length
    return np.asarray(one.multiply(other).sum(axis=1))[:, 0]


def overlap(firsts, seconds):
    """Returns (N,): the number of words in both lists, divided by the number of words in either (Jaccard)."""
    sets = [(set(first), set(second)) for first, second in zip(firsts, seconds, strict=True)]
    return [len(one & other) / max(1, len(one | other)) for one, other in sets]


def words(texts):
    """Splits each text into words as an encoder does; returns lists of strings."""
    import tensorflow as tf

    from moco_tf.data.inputs import text as inputs

    return inputs.split(tf.constant(texts)).to_list()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
