"""JPEG files: their markers, whether libjpeg-turbo reads them without a warning, their pixels."""
