"""Protocols that judge an encoder: kNN, linear probe, fine-tuning, detection."""
