"""Reports as one HTML file: what it can show (`content`), how it is written (`build`), its pictures (`pictures`)."""
