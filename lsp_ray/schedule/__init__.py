"""Decides what runs next: pure policies, without torch, Ray or a clock."""
