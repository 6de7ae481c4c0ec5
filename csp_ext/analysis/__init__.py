"""What the attention of a prompt's observation window looks like, within and across modalities."""
