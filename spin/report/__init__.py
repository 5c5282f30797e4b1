"""Tables and figures of a run, and the model card."""
