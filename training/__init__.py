"""The training loop; imports only model/ and utils/, loaders are passed in."""
