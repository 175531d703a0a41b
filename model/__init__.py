"""Backbone, normalizer and action heads; imports only utils/."""
