"""Measures predictors: accuracy, speed, memory. Knows no model and how none was made."""
