"""Running a trained network no deeper than needed."""
