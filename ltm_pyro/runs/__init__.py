"""What training leaves behind, and how it is read: runs, checkpoints, trained models, thoughts in files, and texts that
a trained model writes."""
