"""The LightningModule."""
