"""One file per engine: a Deployment translated into its flags."""
