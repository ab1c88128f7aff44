"""Score distillation: one file per family, and the fake score that they share."""
