"""Metrics of classifiers, and their bootstrap intervals."""
