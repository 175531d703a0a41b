"""Backbone, normalizer and action heads; imports only utils/."""

from utils.library_noise import drop_library_noise

drop_library_noise()  # before transformers, peft and bitsandbytes are imported, for they speak at their import
