"""scikit-learn's logistic regression on the features of a run, to hold the linear probe against (evaluation.md).

python -m moco_tf.evaluate.features --encoder=RUN --split=train --output=features/train
python -m moco_tf.evaluate.features --encoder=RUN --split=test --output=features/test
python docs/results/logistic_regression.py features/train features/test
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV


def load(folder):
    shards = [np.load(file) for file in sorted(Path(folder).glob("features-*.npz"))]
    return tuple(np.concatenate([shard[name] for shard in shards]) for name in ("features", "labels"))


(train, train_labels), (test, test_labels) = map(load, sys.argv[1:3])
model = LogisticRegressionCV(Cs=(1e-3, 1e-2, 0.1, 1, 10), cv=5, max_iter=300)
model.fit(train, train_labels)  # folds hold as many of each class
best = np.ravel(model.C_)[0]
print(f"C {best:g}, the best on held-out training images: top-1 {100 * model.score(test, test_labels):.2f} %")
for penalty in (0.01, 0.1, 1, 10, 100, 1000):  # 1 is scikit-learn's own choice; the more, the less it is held back
    model = LogisticRegression(C=penalty, max_iter=300).fit(train, train_labels)
    print(f"C {penalty:g}: top-1 {100 * model.score(test, test_labels):.2f} % of {len(test)} test images")
