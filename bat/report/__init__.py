"""Plots, tables and the HTML report of runs."""
