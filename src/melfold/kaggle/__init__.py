"""Kaggle: the CLI, the ledger, kernels, submissions."""
