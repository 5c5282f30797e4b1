"""The paper in miniature: a small world in which SPIN can be watched at work on a CPU."""
