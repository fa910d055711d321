"""Edit records as batches: tokenised requests and probes, the task mixture, the LightningDataModule."""
