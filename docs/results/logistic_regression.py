"""scikit-learn's logistic regression on the features of a run, to hold the linear probe against (evaluation.md).

python -m moco_tf.evaluate.features --encoder=RUN --split=train --output=features/train
python -m moco_tf.evaluate.features --encoder=RUN --split=test --output=features/test
python docs/results/logistic_regression.py features/train features/test
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def load(folder):
    shards = [np.load(file) for file in sorted(Path(folder).glob("features-*.npz"))]
    return tuple(np.concatenate([shard[name] for shard in shards]) for name in ("features", "labels"))


(train, train_labels), (test, test_labels) = map(load, sys.argv[1:3])
held_out = np.arange(len(train)) % 10 == 0  # chooses the penalty, as the probe chooses its rate
scores = {}
for penalty in 10.0 ** np.arange(-4, 2):
    model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=500))
    scores[penalty] = model.fit(train[~held_out], train_labels[~held_out]).score(
        train[held_out], train_labels[held_out]
    )
best = max(scores, key=scores.get)
model = make_pipeline(StandardScaler(), LogisticRegression(C=best, max_iter=500)).fit(train, train_labels)
print(f"C {best:g} of {', '.join(f'{c:g}' for c in scores)}, held-out {100 * scores[best]:.2f} %")
print(f"top-1 of {len(test)} test images {100 * model.score(test, test_labels):.2f} %")
