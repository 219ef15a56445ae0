"""Formats: model files and checkpoints, diffusers' pipelines, MNIST's files, folders of images."""
