"""Tests of the method alone: torch and torchvision, no Ray, no Avalanche."""
