"""Growth in the training loops of others: one module per framework, each imported only where that is installed.

Typical use::

    from esper.kasmina.integrations.lightning import GrowthCallback      # pip install 'esper[lightning]'
    from esper.kasmina.integrations.transformers import GrowthCallback   # pip install 'esper[transformers]'

    trainer = Trainer(..., callbacks=[GrowthCallback(mesh="localhost:7600")])
"""
