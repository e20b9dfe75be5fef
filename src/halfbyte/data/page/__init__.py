"""The preview as one page for a browser, without any request to anywhere."""
