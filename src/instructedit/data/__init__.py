"""Edit records as batches: tokenised requests and probes, the task mixture, the LightningDataModule."""

from instructedit.data.neighborhood import with_neighbors

__all__ = ["with_neighbors"]
