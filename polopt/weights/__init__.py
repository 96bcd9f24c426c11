"""Weights per trajectory or step, general or shared by three or more methods."""
