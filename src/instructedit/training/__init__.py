"""The LightningModule and its losses."""
