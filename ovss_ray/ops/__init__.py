"""Pure tensor functions shared by the segmenters; nothing here knows of models, files or settings."""
