"""Consistency models, flow maps and other maps along an ODE: one file per family, and the mathematics that they share."""
