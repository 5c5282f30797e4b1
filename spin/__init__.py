"""Self-play fine-tuning (SPIN, arXiv 2401.01335) on top of model/."""
