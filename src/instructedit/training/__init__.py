"""Training of editors: the LightningModule and its optimiser."""
