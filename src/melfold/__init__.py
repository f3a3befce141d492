"""melfold: a Kaggle submission kit for Freesound Audio Tagging 2019."""

__version__ = "0.1.0"
