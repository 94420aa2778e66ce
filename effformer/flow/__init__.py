"""Rectified flow: conventions, paths, objectives, samplers, guidance."""
