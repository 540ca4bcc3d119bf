"""Making a view: a corpus of the base's own answers, blocks drawn from it, the losses and the loop."""
