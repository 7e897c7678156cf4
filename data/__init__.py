"""Pairs of responses as text, as tokens and as batches; one folder per dataset."""
