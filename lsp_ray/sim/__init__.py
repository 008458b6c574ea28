"""Simulates steps before they are run: the live policies on a machine that is only described. No torch, no Ray."""
