"""Competition tables, log-mels, folds and crops."""
