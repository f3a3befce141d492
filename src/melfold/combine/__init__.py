"""From predictions to a submission."""
