"""Linear classifiers that have one optimum: moments of features by class, logistic regression. It knows no stores and methods."""
