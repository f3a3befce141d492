"""What runs inside Kaggle's kernels."""
