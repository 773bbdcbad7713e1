"""The one training loop: `settings.TrainSettings` says how, `loop.train` does it, `losses` holds objectives."""
